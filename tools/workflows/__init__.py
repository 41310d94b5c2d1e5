"""The makers of what the pack ships beside its code: workflows, their cards, and the pictures of the help pages."""
