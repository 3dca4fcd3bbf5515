"""Methods: compositions of a link, an ensemble and a criterion; the policy that says when a sample leaves."""
