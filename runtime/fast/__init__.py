"""How is a step computed faster?"""
