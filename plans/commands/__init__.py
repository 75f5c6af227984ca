"""What do both commands share: the terminal, options, children, a look at free memory?"""
