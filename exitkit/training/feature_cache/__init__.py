"""The feature cache: a frozen backbone's features of every sample, computed once and read in every epoch."""
