"""Reports: the page of a comparison, its charts, and heat maps as PNG files."""
