"""Short lists of function words by language, for the classic baselines that leave them out.

One table; they are the commonest articles, pronouns, prepositions, conjunctions and auxiliaries, negations left alone.
Nothing here decides when to use them.
"""

STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "a about above after again against all am an and any are as at be because been before being below between both "
        "but by can could did do does doing down during each few for from further had has have having he her here hers herself "
        "him himself his how i if in into is it its itself just me more most my myself of off on once only or other our ours "
        "ourselves out over own same she should so some such than that the their theirs them themselves then there these they "
        "this those through to too under until up very was we were what when where which while who whom why will with would "
        "you your yours yourself yourselves it's i'm you're he's she's we're they're i've you've we've they've i'll you'll",
        "zh": "的 了 着 过 和 与 及 或 而 且 但 但是 在 是 有 也 都 就 还 又 再 很 太 更 最 把 被 让 给 对 对于 关于 从 向 往 到 由 以 为 "
        "因为 所以 如果 虽然 我 你 他 她 它 我们 你们 他们 她们 它们 这 那 这个 那个 这些 那些 哪 什么 怎么 谁 之 其 此 个 等 啊 吗 呢 吧 "
        "呀 哦 嗯 地 得 上 下 里 中 一个 一些 一种 自己",
        "fr": "à au aux avec ce ces cet cette dans de des du elle elles en est et eux il ils je la le les leur leurs lui ma mais me "
        "mes moi mon nos notre nous on ou où par pour qu que qui sa se ses son sur ta te tes toi ton tu un une vos votre vous y "
        "été être suis es sommes êtes sont était étaient a as ai avons avez ont avait avaient c d j l m n s t",
        "de": "aber als am an auch auf aus bei bin bis bist da damit dann das dass dein deine dem den der des dessen die dies diese "
        "dieser dieses doch dort du durch ein eine einem einen einer eines er es euer für habe haben hat hatte hatten hier "
        "hinter ich ihm ihn ihnen ihr ihre im in ist ja kann können man mein meine mich mir mit nach nun nur ob oder sein seine "
        "sich sie sind so über um und uns unser unter vom von vor war waren was wenn wer wie wir wird wo zu zum zur zwischen",
        "es": "a al algo ante antes como con contra cual cuando de del desde donde durante e el ella ellas ellos en entre era eran es "
        "esa ese eso esta estaba este esto están está fue ha han hasta hay la las le les lo los me mi mis muy más nos nosotros o "
        "otra otro para pero por porque que quien se ser si sin sobre son su sus también te tiene todo tu tus un una uno y ya yo",
    }.items()
}
