"""Reports: what artefacts say, as JSON values and for people. Nothing here measures anything."""
