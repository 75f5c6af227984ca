"""How do weights get their few bits on the way into a stage's file?"""
