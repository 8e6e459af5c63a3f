"""Reports that a person reads: pictures of maps, and the page that ``ttd demo`` ends in."""
