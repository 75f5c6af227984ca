"""How are weights of four or eight bits stored?"""
