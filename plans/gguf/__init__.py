"""What lies in a GGUF file?"""
