drop table cluster_watches;
