"""How do the stages make one model?"""
