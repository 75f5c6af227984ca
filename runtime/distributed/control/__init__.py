"""Who takes part, who is alive, who is lost?"""
