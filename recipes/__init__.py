"""Recipes that come with moacompress, `<model>/<goal>.yaml`. Data only: no code lives here."""
