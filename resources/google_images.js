// What download_data.py does in Google's pages. Chromium runs this in each before the page's own scripts.
window.googleImages = (() => {
  // What the result page is known by. Class names change, these attributes have not from 2024 to 2026.
  const TILE = 'div[data-attrid="images universal"][data-docid]';
  // Cookies are refused in a dialog over the results, or on a page that has a form for each answer. Their hidden
  // fields are the same in all languages; the words are for the day when they change.
  const REJECT = '#W0wltc, form[action$="/save"]:has([name="set_eom"][value="true"]):not(:has([name="set_sc"]))'
    + ' :is(button, [type="submit"]):not([value="false"])';
  const REJECT_WORDS = 'reject all|alle ablehnen|tout refuser|rechazar todo|rifiuta tutto|rejeitar tudo'
    + '|alles afwijzen|odrzuć wszystko|avvisa alla|afvis alle|すべて拒否|모두 거부|全部拒绝|全部拒絕|отклонить все';
  const ACCEPT = '#L2AGLb';
  // Further results are asked for at the page's end, in ways that have changed with the years.
  const MORE = '#smb, .mye4qd, a[jsname="oHxHid"], .GNJvt';
  const MORE_WORDS = '(show )?more results|(weitere|mehr) ergebnisse( anzeigen)?'
    + '|(autres|plus de) résultats( de recherche)?|(mostrar |ver )?más resultados|(mostra )?altri risultati'
    + '|(mostrar |ver )?mais resultados|meer resultaten( weergeven)?|(pokaż )?więcej wyników'
    + '|(visa )?fler resultat|(vis )?flere resultater|(показать )?(ещё|больше) результат(ы|ов)'
    + '|(結果を)?もっと見る|더보기|更多结果|更多結果';

  // The bodies of what the page fetches; later results come that way.
  const bodies = [];
  const keep = (text) => bodies.push(text);
  const fetchAsBefore = window.fetch;
  window.fetch = async (...args) => {
    const response = await fetchAsBefore(...args);
    response.clone().text().then(keep, () => {});
    return response;
  };
  const sendAsBefore = XMLHttpRequest.prototype.send;
  XMLHttpRequest.prototype.send = function (...args) {
    this.addEventListener('load', () => {
      if (['', 'text'].includes(this.responseType)) keep(this.responseText);
    });
    return sendAsBefore.apply(this, args);
  };

  const isVisible = (selector) => [...document.querySelectorAll(selector)].some((found) => found.checkVisibility());

  // Click on the first visible control that fits or bears some words; return whether there is one.
  const click = (selector, words) => {
    const called = new RegExp(`^\\s*(${words})\\s*$`, 'i');
    const controls = `${selector}, button, a, [role=button], [type=button], [type=submit]`;
    const control = [...document.querySelectorAll(controls)].find((found) =>
      found.checkVisibility() && !found.closest(TILE) && (found.matches(selector)
        || [found.ariaLabel, found.value, found.textContent].some((text) => called.test(text))));
    control?.click();
    return Boolean(control);
  };

  return {
    // Return what the browser shows: captcha, consent, wall (JavaScript is wanted), results, or empty.
    state: () => {
      const {hostname, pathname} = window.location;
      if (pathname.startsWith('/sorry/') || isVisible('#captcha-form')) return 'captcha';
      if (hostname.startsWith('consent.') || isVisible(`${REJECT}, ${ACCEPT}`)) return 'consent';
      if (pathname.startsWith('/httpservice/retry/enablejs')) return 'wall';
      return isVisible(TILE) ? 'results' : 'empty';
    },
    rejectCookies: () => click(REJECT, REJECT_WORDS),
    scrollToEnd: () => window.scrollTo(0, document.body.scrollHeight),
    askForMore: () => click(MORE, MORE_WORDS),
    // Return docid, address, page, title of each tile, and whether the address is a thumbnail's; and the bodies
    // kept since the last look.
    look: () => [[...document.querySelectorAll(TILE)].map((tile) => {
      const link = tile.querySelector('a[href*="/imgres?"]'), image = tile.querySelector('img');
      const fields = new URLSearchParams(link?.search);  // imgurl=...&imgrefurl=...
      const thumbnail = image?.src.startsWith('http') ? image.src : '';
      const page = fields.get('imgrefurl') || tile.dataset.lpage;
      return [tile.dataset.docid, fields.get('imgurl') || thumbnail, page, image?.alt, !fields.get('imgurl')];
    }), bodies.splice(0)],
    clickTile: (docid) => {
      const tile = document.querySelector(`${TILE}[data-docid="${docid}"]`);
      (tile?.querySelector('a, img') || tile)?.click();
    },
  };
})();
