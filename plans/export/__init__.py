"""What lies in an export?"""
