"""One graph rewrite per file; each says whether it changed anything."""
