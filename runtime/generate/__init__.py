"""How do steps become text?"""
