"""What is computed in one step, and for whom?"""
