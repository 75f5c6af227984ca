"""How does a folder appear whole or not at all?"""
