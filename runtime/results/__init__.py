"""What did a run do, in numbers?"""
