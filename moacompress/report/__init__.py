"""Reports: what artefacts say, for people. Everything here takes data and formats it; nothing here measures or decides."""
