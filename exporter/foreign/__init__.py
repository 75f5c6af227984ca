"""What does a checkpoint in another format become?"""
