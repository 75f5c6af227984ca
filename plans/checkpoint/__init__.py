"""What lies in a model folder?"""
