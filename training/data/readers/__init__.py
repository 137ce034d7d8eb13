"""Tables in files of any format."""
