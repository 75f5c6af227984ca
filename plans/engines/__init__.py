"""What do we know of other engines: how they divide layers, and how they write it down?"""
