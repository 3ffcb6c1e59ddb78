"""What makes files of the pack anew; nothing of the pack imports it."""
