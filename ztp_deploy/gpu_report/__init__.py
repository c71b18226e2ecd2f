"""`ztp gpu-report`: everything a GPU can run, measured over as many calls as it takes."""
