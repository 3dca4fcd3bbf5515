"""The feature cache: what a frozen backbone says about every sample, computed once and read in every epoch."""
