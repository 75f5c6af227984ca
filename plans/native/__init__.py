"""How does C of ours come to run here?"""
