"""The RecommendOffers and PredictEvents RPCs."""
