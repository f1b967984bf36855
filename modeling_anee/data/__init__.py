"""Reading and writing: what every other folder of the workshop may import. It imports none of them; never shipped."""
