"""The page of a run: what was gained and what was lost, from the artefacts that lie there, in one HTML file.

`findings` reads, the modules of figures turn numbers into pictures, `report_page` puts them into the template; how it looks and
what a click does is in `assets`. Nothing here measures anything, and nothing is fetched.
"""
