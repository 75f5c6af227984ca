"""What is loaded, onto what, and may it?"""
