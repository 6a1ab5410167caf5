"""What ops cost: seconds and bytes, measured or from a roofline; each number names its source."""
