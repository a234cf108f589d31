"""Packhorse and its peers side by side: see __main__.py. No test here times anything."""
