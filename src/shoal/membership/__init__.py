"""Who may be here, who is here, and how a group of members agrees."""
