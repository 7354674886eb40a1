"""Looking at results in a browser: the page, and the server that fills it."""
