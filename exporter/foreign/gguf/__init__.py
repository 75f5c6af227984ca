"""What does a GGUF file become?"""
