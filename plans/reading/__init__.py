"""How is a file read that nobody vouches for?"""
