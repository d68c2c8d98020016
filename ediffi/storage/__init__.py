"""Tars and what lies in them: headers, indexes, samples, joins; remote ones and local copies."""
