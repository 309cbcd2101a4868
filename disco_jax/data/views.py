"""A recipe: crops drawn on the host, photometric operations named for the step."""
