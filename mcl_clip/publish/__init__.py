"""Publishing: folders, model cards, the Hub."""
