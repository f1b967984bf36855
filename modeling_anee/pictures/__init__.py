"""What a trace, a text under a budget or a comparison looks like: pictures, and the page of a generation."""
