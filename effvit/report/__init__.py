"""The study's report: tables read back, research questions answered from them, one page that shows both."""
