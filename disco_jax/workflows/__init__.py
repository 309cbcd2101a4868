"""Whole runs that several commands start: of one student, and of several in one step."""
