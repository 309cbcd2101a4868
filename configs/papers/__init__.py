"""Tables and figures of the papers: the config and the evaluation of every cell."""
