"""How does a client somewhere else ask the model?"""
