Rodzina jadła razem kolację.
Czy jeździsz do szkoły autobusem?
Nie możesz iść dzisiaj na zakupy.
Mój siostrzeniec przyglądał się zwierzętom w zoo.
John ma nadzieję uniezależnić się od rodziców.
Czy to jest kot czy pies?
W kuchni jest kot.
Jestem waszym tatą.
Czy kot jest na krześle, czy pod krzesłem?
Słyszałam wybuchy.
Odniósł rany podczas wypadku samochodowego.
Dopiero co ukończyła college, więc brak jej doświadczenia.
