"""How must weights be rounded so that what a text makes of them changes least?"""
