"""What does config.json say, and what does it leave to the family?"""
