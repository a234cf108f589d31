"""Packhorse and its peers side by side: see __main__.py. Nothing here is a test that times anything."""
