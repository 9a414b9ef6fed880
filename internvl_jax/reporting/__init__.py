"""The report of a run: one HTML page that asks for nothing else.

run_files.py   reads what a run has left, or leaves meanwhile, in its output directory
curves.py      series of the log, with few enough points to be drawn
sections.py    what the page says, as plain values: summary, samples, histograms, predictions, settings, starts
page.py        the page: page.html filled with them, page.css and page.js in it
"""
