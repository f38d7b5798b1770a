No os desprecian.
Vi fugazmente al fantasma sentado al volante.
Parece que a todo el mundo le gusta el golf.
Meg habla demasiado.
Le ardían las mejillas de vergüenza.
En el futuro habrá un gran terremoto.
El único gol de la final lo marcó Andrés Iniesta.
¿Ya has comido?
Lloro por mi juventud perdida.
Hace poco volvió de Francia.
Me estoy muriendo de hambre.
Me sentí avergonzado cuando señalaron mis errores.
